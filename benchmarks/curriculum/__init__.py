"""Does a curriculum of lengths reach the loss of training at the longest length in less time?"""
