"""A ticket becomes a clip. Nothing heavy is imported here: the catalog runs without torch and OpenCV."""
