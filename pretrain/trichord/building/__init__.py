"""From files, tables, annotations and datasets on disk to shards: converters, the writer, splitting."""
