"""The embedded engine, llama.cpp, and the start of an engine of each kind."""
