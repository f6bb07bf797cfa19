"""From a model to a measured and exported head: planned for a budget of time, each stage done once."""
