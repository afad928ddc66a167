"""HTTP front of the server: authentication, admission, scheduling, streaming."""
