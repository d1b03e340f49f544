"""What people look at: a report as an HTML page, pictures, and files for TensorBoard's projector."""
