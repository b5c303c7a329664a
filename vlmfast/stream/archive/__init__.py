"""What a stream has seen, kept in RAM and then on disk: blocks, their summaries, and the folder they are saved in."""
