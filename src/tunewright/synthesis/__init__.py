"""Rows that a model writes: ideal outputs for inputs without one, and questions with answers from documents."""
