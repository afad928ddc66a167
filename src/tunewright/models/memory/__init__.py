"""Memory estimates for training, from the base's config.json before anything is loaded."""
