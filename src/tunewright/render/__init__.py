"""Results as documents: blocks, and their layout on the terminal, as HTML and as Markdown."""
