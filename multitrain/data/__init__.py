"""From a sample (dataset, index, epoch) to a clip. Imports nothing heavy: the catalog runs without torch and OpenCV."""
