"""The mapper sets a pixel of the image that it was given."""

from right_model import build, map_images

CLAUSE = "the mapper is pure"


def painting(ctx, images):
    for image in images:
        image.putpixel((0, 0), tuple(255 - value for value in image.getpixel((0, 0))))
    return map_images(ctx, images)


Model = build(mapper=painting)
