"""Results as text, Markdown, CSV, HTML and PNG."""
