"""Models behind OpenAI-compatible endpoints: requests with limits, retries and a budget, each reply kept."""
