"""ReVal inside other trainers."""
