"""A server for many clients: requests in OpenAI's shapes, decoded at once, each as it would be alone."""
