"""Expert usage at run time: statistics, traces of requests, and the vLLM worker extension that reports them."""
