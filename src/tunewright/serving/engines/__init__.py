"""The embedded engine, llama.cpp, and starting an engine of each kind."""
