"""ASGI layers around the app, one class a file."""
