"""What runs came to: read back from their folders, averaged, compared, as text and as pages."""
