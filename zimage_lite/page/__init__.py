"""What pages are built with: HTML, Markdown and plots."""
