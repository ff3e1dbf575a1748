"""Reports of a run as HTML, Markdown, JUnit and GitHub annotations."""
