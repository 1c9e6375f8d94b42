"""The demo: a guest with a self-check, saved mid-run and restored in another process."""
