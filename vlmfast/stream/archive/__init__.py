"""The archive of a stream: blocks in RAM and on disk, their representatives, and the folder they are saved in."""
