"""Reports on finished runs: read from their folders, averaged over seeds, compared, as text and as HTML pages."""
