"""Importing foreign adapters: copied first, checked to the byte, and only then stored.

An adapter is untrusted input. Pickles run code, a header can claim more memory than exists, a configuration names
modules to import, and a link leads to another file. Everything that is not on an allowlist is refused.
"""
