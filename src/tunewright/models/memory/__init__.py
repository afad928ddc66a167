"""What a training needs of memory, known from the base's config.json before anything is loaded."""
