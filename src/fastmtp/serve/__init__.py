"""Many requests decoded at once, each as it would be alone."""
