"""``tomoe doctor --full``: everything that can be checked on a GPU, within a time limit, as a report.

    plan.py            which checks there are, most valuable first
    runner.py          runs them in child processes, until the time is over
    worker.py          a child process; a crash or a hang costs one check
    kernel_jobs.py     kernels: values, CUDA graphs, times; rates of the device
    training_jobs.py   a few training steps on the device and on the CPU
    engine_jobs.py     vLLM against the Hugging Face model, and against the dense model
    report.py          results as JSON, written after each group of checks
    page.py            the same as a page in Markdown, to attach to a bug report

Only ``engine_jobs.py`` imports vLLM, and only in a child process.
"""
