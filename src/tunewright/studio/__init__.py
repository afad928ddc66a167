"""The studio: review, blind comparison, reports and jobs of a project in a browser."""

from tunewright.studio.app import Studio

__all__ = ["Studio"]
