"""Builder of batches of shards, with the options of both `ShardSource` and `ImageDataModule`."""

from dpm_scales.data.builders import batches_of
from dpm_scales.shards.source import ShardSource

shards_data = batches_of(ShardSource, "shards_data")
