"""Letting foreign adapters in: copied first, checked to the byte, and stored only then.

An adapter is untrusted input: pickles run code, a header can claim more memory than there is, a configuration names
modules to import, an archive writes outside of its folder. What is not on a list of what is allowed is refused.
"""
