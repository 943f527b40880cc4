"""Networks by name: the released Stable Diffusion models, and two that a laptop trains."""

from typing import Any

from sdjax.errors import UserError
from sdjax.models.clip import CLIPText
from sdjax.models.unet import UNet
from sdjax.models.vae import AutoencoderKL

# Width and depth of https://github.com/mlfoundations/open_clip; Stable Diffusion 2 was trained on
# the last hidden state but one, so that the last of 24 layers is left out.
OPENCLIP_H = CLIPText(width=1024, layers=23, heads=16, mlp_width=4096, activation="gelu")
OPENCLIP_BIG_G = CLIPText(
    width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu", projection=1280)

PRESETS = {
    # Rombach et al. 2022; https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5
    "sd15": dict(
        unet=UNet(),
        vae=AutoencoderKL(),
        text_encoders=(CLIPText(),)),

    # OpenCLIP H/14, heads of 64 channels each, Dense doors of the transformers.
    "sd21": dict(
        unet=UNet(
            num_heads=(5, 10, 20, 20), cross_attention_dim=1024, linear_projection=True,
            sample_size=96),
        vae=AutoencoderKL(),
        text_encoders=(OPENCLIP_H,)),

    # Podell et al. 2023, https://arxiv.org/abs/2307.01952, table 1.
    "sdxl": dict(
        unet=UNet(
            block_out_channels=(320, 640, 1280), attention=(False, True, True),
            num_heads=(5, 10, 20), transformer_layers=(1, 2, 10), cross_attention_dim=2048,
            linear_projection=True, added_dim=2816, sample_size=128),
        vae=AutoencoderKL(scaling_factor=0.13025),
        text_encoders=(CLIPText(), OPENCLIP_BIG_G)),

    # Five numbers beside the text, the last a score of beauty, and one tower.
    "sdxl_refiner": dict(
        unet=UNet(
            block_out_channels=(384, 768, 1536, 1536), attention=(False, True, True, False),
            num_heads=(6, 12, 24, 24), transformer_layers=4, cross_attention_dim=1280,
            linear_projection=True, added_dim=2560, sample_size=128),
        vae=AutoencoderKL(scaling_factor=0.13025),
        text_encoders=(OPENCLIP_BIG_G,)),

    # Ho et al. 2020, https://arxiv.org/abs/2006.11239, appendix B, with heads as released at
    # https://huggingface.co/google/ddpm-cifar10-32: pixels, and nothing to read.
    "cifar10": dict(
        unet=UNet(
            in_channels=3, out_channels=3, block_out_channels=(128, 256, 256, 256),
            attention=(False, True, False, False), num_heads=1, cross_attention_dim=None,
            sines_first=True, frequency_shift=1, norm_epsilon=1e-6, downsample_padding=0,
            dropout=0.1, sample_size=32)),

    # 32 px pictures of coloured shapes in minutes on a CPU.
    "shapes": dict(
        unet=UNet(
            block_out_channels=(48, 64), attention=(True, True), layers_per_block=1,
            num_heads=(3, 4), cross_attention_dim=96, norm_groups=16, sample_size=8),
        vae=AutoencoderKL(
            block_out_channels=(16, 32, 64), layers_per_block=1, norm_groups=8,
            mid_block_attention=False, scaling_factor=1.0),
        text_encoders=(CLIPText(
            vocab_size=640, max_length=24, width=96, layers=3, heads=4, mlp_width=384),)),

    # 64 px photographs on a CPU: configs/images.py.
    "small": dict(
        unet=UNet(
            block_out_channels=(64, 128, 128), attention=(False, True, True), layers_per_block=1,
            num_heads=(4, 8, 8), cross_attention_dim=128, norm_groups=16, sample_size=16),
        vae=AutoencoderKL(
            block_out_channels=(32, 64, 64), layers_per_block=1, norm_groups=16,
            mid_block_attention=False, scaling_factor=1.0),
        text_encoders=(CLIPText(
            vocab_size=2048, max_length=32, width=128, layers=3, heads=4, mlp_width=512),)),

    # As small as the topology allows, for tests: what counts is the time to compile.
    "tiny": dict(
        unet=UNet(
            block_out_channels=(32, 64), attention=(False, True), layers_per_block=1,
            num_heads=(2, 2), cross_attention_dim=32, norm_groups=8, mid_block=False,
            sample_size=8),
        vae=AutoencoderKL(
            block_out_channels=(8, 16, 16), layers_per_block=1, norm_groups=4,
            mid_block_attention=False),
        text_encoders=(CLIPText(
            vocab_size=640, max_length=24, width=32, layers=1, heads=2, mlp_width=64),)),
}


def preset(name: str) -> dict[str, Any]:
  """Returns {"unet": UNet, "vae": AutoencoderKL, "text_encoders": (CLIPText, …)} of a known model.

  Models of pixels have a UNet alone.

  Raises:
    UserError: when `name` is not a key of `PRESETS`.
  """
  if name not in PRESETS:
    raise UserError(f"model {name!r} is not known; choose one of {', '.join(PRESETS)}")
  return dict(PRESETS[name])
