"""Fine-tune Llama and Mistral for your domain, and prove it beat prompting."""

from tunewright._version import __version__
from tunewright.errors import UserError

__all__ = ["UserError", "__version__"]
