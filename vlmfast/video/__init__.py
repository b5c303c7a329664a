"""Video in: files, folders, cameras and URLs become frames with timestamps. Nothing heavy is imported until asked."""
