"""Other libraries' data sets over fastload: code that was written for them changes one import.

    import fastload.adapters.webdataset as wds
    from fastload.adapters.streaming import StreamingDataset, StreamingDataLoader, Stream

Each module has the names of the library that it is called after, with the same arguments. What they ask for is done, or
a warning says what is not used and why, or an error what to write instead.
"""
