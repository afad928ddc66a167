"""The gate: does an engine, or an exported file, answer as the trained model does?"""
