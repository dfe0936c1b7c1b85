"""Sizes of a model of a few thousand weights that reads the scenes' words, for tests that evaluate and ask."""

from dataset.scenes import files as scenes_files

BERT = {
    "vocab_size": len(scenes_files.vocabulary()),
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "fusion_layer": 1,
    "encoder_width": 16,
}
SIZES = {"image_res": 48, "patch_size": 16, "vision_width": 16, "vision_depth": 2, "vision_heads": 2, "embed_dim": 8}
