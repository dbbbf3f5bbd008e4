"""How alike two pictures are that should show the same: PSNR, SSIM, a map of the differences."""

from .measures import WINDOW, check_alike, difference_map, psnr, ssim

__all__ = ["WINDOW", "check_alike", "difference_map", "psnr", "ssim"]
