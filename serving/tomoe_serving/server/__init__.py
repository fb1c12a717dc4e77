"""The process: settings, engine, app, life cycle, sockets, logs."""
