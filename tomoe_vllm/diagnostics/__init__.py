"""Is it right and how fast on this machine: ``tomoe doctor``, ``tomoe bench``, ``tomoe tune``."""
