"""One folder per operation: checks and dispatch in __init__.py, the plain-torch version in reference.py."""
