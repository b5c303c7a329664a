"""The tables and pictures of the documents, made from the result files."""
