"""KerasHub backbones from small configs: random weights, fixed input sizes, nothing downloaded.

`BACKBONES` maps names to functions that build a functional model. Run as a script it prunes each
of them by random masks and prints the certificate's difference, or why there is none:

    python examples/benchmarks/hub_models.py            # all of them, some minutes
    python examples/benchmarks/hub_models.py Bert GPT2  # those whose names begin like this
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import keras
from half_closed import close_half, difference, random_inputs

import keras_polar

LENGTH = 6  # of every sequence
BACKBONES: dict[str, Callable[[], keras.Model]] = {}


def fixed(backbone: keras.Model, **sizes: tuple) -> keras.Model:
    """The backbone on inputs without unknown sizes: `sizes` by input name, else LENGTH."""

    def new(x: Any) -> Any:
        known = tuple(d or LENGTH for d in x.shape[1:])
        return keras.Input(sizes.get(x.name, known), dtype=x.dtype, name=x.name)

    inputs = keras.tree.map_structure(new, backbone.input)
    return keras.Model(inputs, backbone(inputs), name=backbone.name)


def entry(build: Callable[[Any], keras.Model]) -> Callable:
    """Registers `build(keras_hub.models)` under the function's name."""

    def run() -> keras.Model:
        import keras_hub

        return build(keras_hub)

    BACKBONES[build.__name__] = run
    return build


def simple(name: str, **config: Any) -> None:
    """A backbone whose class takes nothing but numbers."""

    def run() -> keras.Model:
        import keras_hub

        return fixed(getattr(keras_hub.models, name)(**config))

    BACKBONES[name] = run


TEXT = {"vocabulary_size": 16, "num_layers": 2, "hidden_dim": 8, "intermediate_dim": 12}
HEADS = {**TEXT, "num_heads": 2}
SHORT = {**HEADS, "max_sequence_length": LENGTH}
QUERY = {**TEXT, "num_query_heads": 2, "num_key_value_heads": 1}
VISION = {"patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 8}
WIDE = {**VISION, "intermediate_dim": 12, "image_shape": (16, 16, 3)}
MOE = {**QUERY, "moe_intermediate_dim": 6, "num_experts": 3, "top_k": 2}

simple("AlbertBackbone", embedding_dim=4, **SHORT)
simple("BartBackbone", **SHORT)
simple("BertBackbone", **SHORT)
simple("BloomBackbone", **HEADS)
simple("DebertaV3Backbone", bucket_size=4, **SHORT)
simple("DistilBertBackbone", **SHORT)
simple("ESMBackbone", **SHORT)
simple("FNetBackbone", **{k: v for k, v in SHORT.items() if k != "num_heads"})
simple("FalconBackbone", num_attention_heads=2, **TEXT)
simple("GPT2Backbone", **SHORT)
simple("GPTNeoXBackbone", rotary_percentage=0.5, **SHORT)
simple("OPTBackbone", **SHORT)
simple("RobertaBackbone", **SHORT)
simple("XLMRobertaBackbone", **SHORT)
simple("RoformerV2Backbone", head_size=4, **HEADS)
simple("XLNetBackbone", **HEADS)
simple("T5Backbone", **HEADS)
simple("GemmaBackbone", head_dim=4, **QUERY)
simple("Gemma3Backbone", head_dim=4, image_size=16, **QUERY)
simple("Gemma4Backbone", head_dim=4, image_size=16, **QUERY)
simple("GptOssBackbone", num_experts=3, **QUERY)
simple("LlamaBackbone", **QUERY)
simple("Llama3Backbone", **QUERY)
simple("MistralBackbone", **QUERY)
simple("MixtralBackbone", num_experts=3, **QUERY)
simple("Phi3Backbone", max_sequence_length=LENGTH, pretraining_sequence_length=LENGTH, **QUERY)
simple("QwenBackbone", **QUERY)
simple("QwenMoeBackbone", shared_expert_intermediate_dim=6, **MOE)
simple("Qwen3Backbone", head_dim=4, **QUERY)
simple("Qwen3MoeBackbone", head_dim=4, **MOE)
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
simple("Qwen3_5Backbone", head_dim=8, **LINEAR, **QUERY)
simple(
    "Qwen3_5MoeBackbone",
    head_dim=8,
    shared_expert_intermediate_size=6,
    **LINEAR,
    **{k: v for k, v in MOE.items() if k != "intermediate_dim"},
)
simple(
    "ElectraBackbone",
    embedding_dim=4,
    vocab_size=16,
    **{k: v for k, v in SHORT.items() if k != "vocabulary_size"},
)
simple(
    "EdRecBackbone",
    vocab_size=16,
    num_layers_enc=1,
    num_layers_dec=1,
    hidden_dim=8,
    intermediate_dim=12,
    num_heads=2,
)
simple(
    "SmolLM3Backbone",
    **TEXT,
    num_attention_heads=2,
    num_key_value_heads=1,
    attention_bias=False,
    attention_dropout=0.0,
    rope_layer_enabled_list=[True, False],
    layer_types=["attention"] * 2,
    mlp_bias=False,
    layer_norm_epsilon=1e-5,
    max_position_embeddings=16,
    rope_theta=10000.0,
    partial_rotary_factor=1.0,
)
BOTH_SIDES = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in {
        "hidden_dim": 8,
        "intermediate_dim": 12,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "layer_types": ["full_attention"] * 2,
    }.items()
}
simple("T5GemmaBackbone", vocabulary_size=16, **BOTH_SIDES)
simple("T5Gemma2Backbone", vocabulary_size=16, **BOTH_SIDES)
simple(
    "RWKV7Backbone",
    hidden_size=8,
    head_size=4,
    num_layers=2,
    vocabulary_size=16,
    intermediate_dim=12,
    gate_lora=4,
    mv_lora=4,
    aaa_lora=4,
    decay_lora=4,
)
simple("CLIPTextEncoder", embedding_dim=8, **SHORT)
simple("MetaCLIP2TextEncoder", embedding_dim=8, **SHORT)
simple("SigLIPTextEncoder", embedding_dim=8, **SHORT)
simple("CLIPVisionEncoder", **WIDE)
simple("MetaCLIP2VisionEncoder", **WIDE)
simple("SigLIPVisionEncoder", **WIDE)
simple("DINOV2Backbone", position_embedding_shape=(16, 16, 3), **WIDE)
simple("DINOV3Backbone", **WIDE)
simple("DeiTBackbone", **WIDE)
simple("ViTBackbone", mlp_dim=12, image_shape=(16, 16, 3), **VISION)
simple(
    "ViTDetBackbone",
    image_shape=(16, 16, 3),
    patch_size=4,
    hidden_size=8,
    num_layers=2,
    intermediate_dim=12,
    num_heads=2,
    num_output_channels=4,
    window_size=2,
    global_attention_layer_indices=[1],
)
simple(
    "SwinTransformerBackbone",
    image_shape=(32, 32, 3),
    embed_dim=8,
    depths=(2, 2),
    num_heads=(2, 2),
    window_size=4,
)
simple(
    "XceptionBackbone",
    stackwise_conv_filters=[[8, 12], [12, 16], [16, 16]],
    stackwise_pooling=[True, True, False],
    image_shape=(32, 32, 3),
)
simple(
    "VGGBackbone",
    stackwise_num_repeats=[2, 2],
    stackwise_num_filters=[8, 12],
    image_shape=(16, 16, 3),
)
simple("DenseNetBackbone", stackwise_num_repeats=[2, 2], growth_rate=8, image_shape=(32, 32, 3))
simple(
    "EfficientNetBackbone",
    stackwise_kernel_sizes=[3, 3, 3],
    stackwise_num_repeats=[1, 2, 1],
    stackwise_input_filters=[8, 8, 16],
    stackwise_output_filters=[8, 16, 16],
    stackwise_expansion_ratios=[1, 2, 2],
    stackwise_squeeze_and_excite_ratios=[0.0, 0.0, 0.25],
    stackwise_strides=[1, 2, 1],
    stackwise_block_types=["fused", "unfused", "v1"],
    stackwise_width_coefficients=[1.0] * 3,
    stackwise_depth_coefficients=[1.0] * 3,
    stackwise_force_input_filters=[0] * 3,
    stackwise_nores_option=[False] * 3,
    input_shape=(32, 32, 3),
    num_features=24,
)
simple(
    "MobileNetV5Backbone",
    stackwise_block_types=[["er"], ["uir", "uir"]],
    stackwise_num_blocks=[1, 2],
    stackwise_num_filters=[[8], [16, 16]],
    stackwise_strides=[[2], [2, 1]],
    stackwise_act_layers=[["relu"], ["relu", "relu"]],
    stackwise_exp_ratios=[[2.0], [2.0, 2.0]],
    stackwise_se_ratios=[[0.0], [0.0, 0.0]],
    stackwise_dw_kernel_sizes=[[0], [5, 5]],
    stackwise_dw_start_kernel_sizes=[[0], [0, 0]],
    stackwise_dw_end_kernel_sizes=[[0], [0, 0]],
    stackwise_exp_kernel_sizes=[[3], [0, 0]],
    stackwise_pw_kernel_sizes=[[1], [0, 0]],
    stackwise_num_heads=[[0], [0, 0]],
    stackwise_key_dims=[[0], [0, 0]],
    stackwise_value_dims=[[0], [0, 0]],
    stackwise_kv_strides=[[0], [0, 0]],
    stackwise_use_cpe=[[False], [False, False]],
    use_msfa=False,
    stem_size=8,
    num_features=16,
    image_shape=(32, 32, 3),
)
simple(
    "MobileNetBackbone",
    stackwise_expansion=[[16, 24], [24, 24]],
    stackwise_num_blocks=[2, 2],
    stackwise_num_filters=[[8, 8], [16, 16]],
    stackwise_kernel_size=[[3, 3], [5, 5]],
    stackwise_num_strides=[[2, 1], [2, 1]],
    stackwise_se_ratio=[[None, None], [0.25, 0.25]],
    stackwise_activation=[["relu", "relu"], ["hard_swish", "hard_swish"]],
    stackwise_padding=[[1, 1], [2, 2]],
    output_num_filters=24,
    depthwise_filters=16,
    depthwise_stride=2,
    depthwise_residual=False,
    last_layer_filter=24,
    squeeze_and_excite=0.5,
    input_num_filters=8,
    image_shape=(32, 32, 3),
)
simple(
    "CSPNetBackbone",
    stem_filters=8,
    stem_kernel_size=3,
    stem_strides=1,
    stackwise_depth=[1, 2],
    stackwise_strides=[1, 2],
    stackwise_num_filters=[16, 24],
    block_type="dark_block",
    stage_type="csp",
    stem_padding="same",
    block_ratio=[0.5],
    image_shape=(16, 16, 3),
)


def resnet(hub: Any, **config: Any) -> keras.Model:
    small = {
        "input_conv_filters": [64],
        "input_conv_kernel_sizes": [3],
        "stackwise_num_filters": [64, 12, 16, 16],
        "stackwise_num_blocks": [1, 2, 1, 1],
        "stackwise_num_strides": [1, 2, 2, 2],
        "block_type": "basic_block",
    }
    return hub.models.ResNetBackbone(**{**small, **config})


@entry
def ResNetBackbone(hub: Any) -> keras.Model:
    return fixed(resnet(hub, image_shape=(32, 32, 3)))


@entry
def ResNetBackbone_bottleneck_v2(hub: Any) -> keras.Model:
    return fixed(
        resnet(
            hub,
            image_shape=(32, 32, 3),
            block_type="bottleneck_block",
            use_pre_activation=True,
        )
    )


@entry
def ResNetBackbone_vd(hub: Any) -> keras.Model:
    stem = {"input_conv_filters": [8, 8, 64], "input_conv_kernel_sizes": [3, 3, 3]}
    return fixed(resnet(hub, image_shape=(32, 32, 3), block_type="bottleneck_block_vd", **stem))


@entry
def RetinaNetBackbone(hub: Any) -> keras.Model:
    encoder = resnet(hub)
    return fixed(
        hub.models.RetinaNetBackbone(
            image_encoder=encoder, min_level=3, max_level=6, use_p5=True, image_shape=(64, 64, 3)
        )
    )


@entry
def DeepLabV3Backbone(hub: Any) -> keras.Model:
    return fixed(
        hub.models.DeepLabV3Backbone(
            image_encoder=resnet(hub),
            spatial_pyramid_pooling_key="P4",
            upsampling_size=4,
            dilation_rates=[2, 3],
            low_level_feature_key="P2",
            projection_filters=6,
            image_shape=(32, 32, 3),
        )
    )


@entry
def BASNetBackbone(hub: Any) -> keras.Model:
    return fixed(
        hub.models.BASNetBackbone(
            image_encoder=resnet(hub),
            num_classes=1,
            projection_filters=64,
            image_shape=(64, 64, 3),
        )
    )


def mit(hub: Any, **config: Any) -> keras.Model:
    return hub.models.MiTBackbone(
        layerwise_depths=[1, 1],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        max_drop_path_rate=0.1,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        hidden_dims=[8, 12],
        image_shape=(32, 32, 3),
        **config,
    )


@entry
def MiTBackbone(hub: Any) -> keras.Model:
    return fixed(mit(hub))


@entry
def SegFormerBackbone(hub: Any) -> keras.Model:
    return fixed(hub.models.SegFormerBackbone(image_encoder=mit(hub), projection_filters=8))


def hgnet(hub: Any, image_shape: tuple = (32, 32, 3), **config: Any) -> keras.Model:
    return hub.models.HGNetV2Backbone(
        depths=[1, 1, 2, 1],
        embedding_size=8,
        hidden_sizes=[12, 16, 20, 24],
        stem_channels=[3, 8, 8],
        hidden_act="relu",
        use_learnable_affine_block=True,
        stackwise_stage_filters=[
            [8, 8, 12, 1, 2, 3],
            [12, 8, 16, 1, 2, 3],
            [16, 8, 20, 2, 2, 5],
            [20, 8, 24, 1, 2, 5],
        ],
        apply_downsample=[False, True, True, True],
        use_lightweight_conv_block=[False, False, True, True],
        image_shape=image_shape,
        **config,
    )


@entry
def HGNetV2Backbone(hub: Any) -> keras.Model:
    return fixed(hgnet(hub))


@entry
def DFineBackbone(hub: Any) -> keras.Model:
    encoder = hgnet(hub, (None, None, 3), out_features=["stage3", "stage4"])
    return fixed(
        hub.models.DFineBackbone(
            backbone=encoder,
            decoder_in_channels=[8, 8],
            encoder_hidden_dim=8,
            num_denoising=0,
            num_labels=4,
            hidden_dim=8,
            learn_initial_query=False,
            num_queries=5,
            anchor_image_size=(64, 64),
            feat_strides=[16, 32],
            num_feature_levels=2,
            encoder_in_channels=[20, 24],
            encode_proj_layers=[1],
            num_attention_heads=2,
            encoder_ffn_dim=12,
            num_encoder_layers=1,
            hidden_expansion=0.5,
            depth_multiplier=0.5,
            eval_idx=-1,
            num_decoder_layers=2,
            decoder_attention_heads=2,
            decoder_ffn_dim=12,
            decoder_n_points=[2, 2],
            lqe_hidden_dim=8,
            num_lqe_layers=2,
            out_features=["stage3", "stage4"],
            image_shape=(64, 64, 3),
            seed=0,
        )
    )


@entry
def DepthAnythingBackbone(hub: Any) -> keras.Model:
    encoder = hub.models.DINOV2Backbone(
        **{**WIDE, "num_layers": 4, "image_shape": (32, 32, 3)},
        position_embedding_shape=(32, 32, 3),
    )
    return fixed(
        hub.models.DepthAnythingBackbone(
            image_encoder=encoder,
            reassemble_factors=[4, 2, 1, 0.5],
            neck_hidden_dims=[4, 6, 8, 10],
            fusion_hidden_dim=8,
            head_hidden_dim=6,
            head_in_index=-1,
            feature_keys=["stage1", "stage2", "stage3", "stage4"],
        )
    )


def pair(hub: Any, family: str, backbone: str, **config: Any) -> keras.Model:
    vision = getattr(hub.models, f"{family}VisionEncoder")(**WIDE)
    text = getattr(hub.models, f"{family}TextEncoder")(embedding_dim=8, **SHORT)
    return fixed(getattr(hub.models, backbone)(vision_encoder=vision, text_encoder=text, **config))


@entry
def CLIPBackbone(hub: Any) -> keras.Model:
    return pair(hub, "CLIP", "CLIPBackbone", projection_dim=6)


@entry
def MetaCLIP2Backbone(hub: Any) -> keras.Model:
    return pair(hub, "MetaCLIP2", "MetaCLIP2Backbone", projection_dim=6)


@entry
def SigLIPBackbone(hub: Any) -> keras.Model:
    return pair(hub, "SigLIP", "SigLIPBackbone")


@entry
def BLIP2Backbone(hub: Any) -> keras.Model:
    language = hub.models.OPTBackbone(**SHORT)
    return fixed(
        hub.models.BLIP2Backbone(vision_encoder=None, qformer=None, language_model=language)
    )


@entry
def PARSeqBackbone(hub: Any) -> keras.Model:
    encoder = hub.models.ViTBackbone(
        **VISION, mlp_dim=12, image_shape=(16, 16, 3), use_class_token=False, name="encoder"
    )
    return fixed(
        hub.models.PARSeqBackbone(
            image_encoder=encoder,
            vocabulary_size=16,
            max_label_length=LENGTH,
            decoder_hidden_dim=8,
            num_decoder_layers=1,
            num_decoder_heads=2,
            decoder_mlp_dim=12,
        )
    )


@entry
def PaliGemmaBackbone(hub: Any) -> keras.Model:
    return fixed(
        hub.models.PaliGemmaBackbone(
            head_dim=4,
            image_size=16,
            vit_patch_size=4,
            vit_num_heads=2,
            vit_hidden_dim=8,
            vit_num_layers=1,
            vit_intermediate_dim=12,
            **QUERY,
        )
    )


@entry
def WhisperBackbone(hub: Any) -> keras.Model:
    return fixed(
        hub.models.WhisperBackbone(
            num_mels=5,
            max_encoder_sequence_length=16,
            max_decoder_sequence_length=LENGTH,
            **HEADS,
        ),
        encoder_features=(16, 5),
    )


@entry
def MoonshineBackbone(hub: Any) -> keras.Model:
    return fixed(
        hub.models.MoonshineBackbone(
            vocabulary_size=16,
            filter_dim=8,
            encoder_num_layers=1,
            decoder_num_layers=1,
            hidden_dim=8,
            intermediate_dim=12,
            encoder_num_heads=2,
            decoder_num_heads=2,
        ),
        encoder_input_values=(1600, 1),
        encoder_padding_mask=(1600,),
    )


def vae(hub: Any) -> keras.Model:
    from keras_hub.src.models.vae.vae_backbone import VAEBackbone

    return VAEBackbone(
        encoder_num_filters=[32, 32],
        encoder_num_blocks=[1, 1],
        decoder_num_filters=[32, 32],
        decoder_num_blocks=[1, 1],
        sampler_method="mode",
        sample_channels=8,
        image_shape=(16, 16, 3),
    )


@entry
def RQVAEBackbone(hub: Any) -> keras.Model:
    from keras_hub.src.models.rqvae.rqvae_backbone import RQVAEBackbone

    return fixed(
        RQVAEBackbone(
            input_dim=8,
            encoder_layer_dims=[12, 10],
            output_dim=6,
            decoder_layer_dims=[10, 12],
            num_embeddings=5,
            num_quantizers=2,
        )
    )


@entry
def VAEBackbone(hub: Any) -> keras.Model:
    return fixed(vae(hub))


@entry
def MMDiT(hub: Any) -> keras.Model:
    from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT

    return fixed(
        MMDiT(
            patch_size=2,
            hidden_dim=8,
            num_layers=2,
            num_heads=2,
            position_size=8,
            latent_shape=(8, 8, 4),
            context_shape=(LENGTH, 12),
            pooled_projection_shape=(10,),
        )
    )


@entry
def StableDiffusion3Backbone(hub: Any) -> keras.Model:
    text = {"embedding_dim": 8, "intermediate_output_index": 0, **SHORT}
    return fixed(
        hub.models.StableDiffusion3Backbone(
            mmdit_patch_size=2,
            mmdit_hidden_dim=8,
            mmdit_num_layers=1,
            mmdit_num_heads=2,
            mmdit_position_size=8,
            mmdit_qk_norm=None,
            mmdit_dual_attention_indices=None,
            vae=vae(hub),
            clip_l=hub.models.CLIPTextEncoder(**text, name="clip_l"),
            clip_g=hub.models.CLIPTextEncoder(**text, name="clip_g"),
            latent_channels=4,
            image_shape=(64, 64, 3),
        )
    )


@entry
def FluxBackbone(hub: Any) -> keras.Model:
    return fixed(
        hub.models.FluxBackbone(
            input_channels=4,
            hidden_size=16,
            mlp_ratio=2.0,
            num_heads=2,
            depth=1,
            depth_single_blocks=1,
            axes_dim=[2, 2, 4],
            theta=10000,
            use_bias=True,
            image_shape=(LENGTH, 4),
            text_shape=(LENGTH, 4),
            image_ids_shape=(LENGTH, 3),
            text_ids_shape=(LENGTH, 3),
            y_shape=(8,),
        )
    )


@entry
def SAMBackbone(hub: Any) -> keras.Model:
    return fixed(
        hub.models.SAMBackbone(
            image_encoder=hub.models.ViTDetBackbone(
                hidden_size=8,
                num_layers=2,
                intermediate_dim=12,
                num_heads=2,
                global_attention_layer_indices=[1],
                patch_size=8,
                num_output_channels=8,
                window_size=2,
                image_shape=(32, 32, 3),
            ),
            prompt_encoder=hub.layers.SAMPromptEncoder(
                hidden_size=8,
                image_embedding_size=(4, 4),
                input_image_size=(32, 32),
                mask_in_channels=8,
            ),
            mask_decoder=hub.layers.SAMMaskDecoder(
                num_layers=1,
                hidden_size=8,
                intermediate_dim=12,
                num_heads=2,
                embedding_dim=8,
                num_multimask_outputs=3,
                iou_head_depth=2,
                iou_head_hidden_dim=8,
            ),
        ),
        points=(1, 2),
        labels=(1,),
        boxes=(1, 2, 2),
        masks=(1, 16, 16, 1),
    )


@entry
def SAM3PromptableConceptBackbone(hub: Any) -> keras.Model:
    size = {"num_layers": 1, "hidden_dim": 8, "intermediate_dim": 12, "num_heads": 2}
    layers = hub.layers
    return fixed(
        hub.models.SAM3PromptableConceptBackbone(
            vision_encoder=layers.SAM3VisionEncoder(
                image_shape=(56, 56, 3),
                patch_size=14,
                fpn_hidden_dim=8,
                fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
                pretrain_image_shape=(28, 28, 3),
                window_size=2,
                global_attn_indexes=[0],
                **size,
            ),
            text_encoder=layers.SAM3TextEncoder(vocabulary_size=16, embedding_dim=8, **size),
            geometry_encoder=layers.SAM3GeometryEncoder(roi_size=3, **size),
            detr_encoder=layers.SAM3DetrEncoder(**size),
            detr_decoder=layers.SAM3DetrDecoder(
                image_shape=(56, 56, 3), patch_size=14, num_queries=4, **size
            ),
            mask_decoder=layers.SAM3MaskDecoder(num_upsampling_stages=3, hidden_dim=8, num_heads=2),
        ),
        token_ids=(32,),
        padding_mask=(32,),
        boxes=(1, 5),
        box_labels=(1,),
    )


@entry
def VideoPrismBackbone(hub: Any) -> keras.Model:
    return fixed(
        hub.models.VideoPrismBackbone(
            num_frames=2,
            patch_size=4,
            hidden_dim=8,
            intermediate_dim=12,
            num_heads=2,
            num_spatial_layers=1,
            num_temporal_layers=1,
            num_auxiliary_layers=0,
            image_shape=(8, 8, 3),
        )
    )


@entry
def Gemma3nBackbone(hub: Any) -> keras.Model:
    from keras_hub.src.models.gemma3n.gemma3n_backbone import Gemma3nBackbone

    return fixed(
        Gemma3nBackbone(
            text_vocab_size=16,
            text_hidden_size=8,
            num_hidden_layers=1,
            pad_token_id=0,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=[12],
            hidden_activation="gelu_approximate",
            layer_types=["full_attention"],
            sliding_window=4,
            rope_theta=10000.0,
            max_position_embeddings=16,
            vocab_size_per_layer_input=16,
            hidden_size_per_layer_input=2,
            altup_num_inputs=2,
            laurel_rank=1,
        ),
        attention_mask=(1, LENGTH, LENGTH),
    )


def main(prefixes: list[str]) -> None:
    """Tries every backbone whose name begins with one of `prefixes`; prints one line each."""
    for name, build in sorted(BACKBONES.items()):
        if not prefixes or name.startswith(tuple(prefixes)):
            start = time.time()
            try:
                said = certified(build())
            except Exception as error:
                said = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{name:32} {time.time() - start:5.1f} s  {said}", flush=True)
            keras.backend.clear_session()


def certified(model: keras.Model) -> str:
    """Half of every group closed at random: the certificate's difference, and what can go."""
    found = keras_polar.inspect(model)
    share = sum(r.weights_share for r in found.rows if r.prunable)
    if not found.prunable:
        return "nothing prunable: " + "; ".join(sorted({r.reason for r in found.rows}))[:300]
    gated = keras_polar.apply(model, 0.01, gate="static", measure="units")
    inputs = random_inputs(model)
    before = difference(model, gated, inputs)
    close_half(gated)
    small = keras_polar.convert(gated)
    off = difference(gated, small, inputs)
    left = small.count_params() / model.count_params()
    closed = [
        f"{r.kind}: {r.reason.split('opened: ')[-1]}" for r in found.rows if "opened" in r.reason
    ]
    return (
        f"{'ok' if max(off, before) <= 1e-4 else 'DIFFERS'} difference {off:.1e}, all gates open "
        f"{before:.1e}, layers with prunable units "
        f"hold {share:.0%} of the weights, units {found.prunable:.0%}, weights left {left:.0%}"
        + (f", closed: {', '.join(sorted(set(closed)))}" if closed else "")
    )


if __name__ == "__main__":
    main(sys.argv[1:])
