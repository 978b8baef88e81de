"""What earlier runs read, and what was learnt of stores: kept in the cache directory, compactly and bounded.

    runfile    the file of one run: format, writing piece by piece, reading with every length checked
    record     what one run reads, gathered into pieces of that file
    archive    the folder of these files: which there are, how much they may take, which goes first
    library    the reads of earlier runs, to find a place in by what is being read
    follow     whether a reader goes the way of an earlier one, and how far that is to be believed

Nothing here fetches, and nothing here is needed: a run without any of it is as right, and begins more slowly.
"""
