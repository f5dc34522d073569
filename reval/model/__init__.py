"""The policy: loading and saving it, its forward pass, its head, and its spread over processes."""
