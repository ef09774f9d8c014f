"""The demo: the whole path on an embedded pool and a small student that it makes itself."""
