# %% 1 · divides by 255 and stops
answer = (0.2, 16, 4)
# %% 1 · forgets that the kernel reaches to both sides
answer = (-0.6, 8, 2)
# %% 1 · doesn't stretch the kernel
answer = (-0.6, 4, 4)
# %% 1 · stretches the kernel when the picture grows
answer = (-0.6, 16, 2)
# %% 1 · counts only the pixels that a new one covers
answer = (-0.6, 4, 1)
# %% 1 · gives one number
answer = -0.6


# %% 2 · squashes, as PaliGemma does
def padded(image, size):
    return ImageProcessor(size)(image)[0]


# %% 2 · crops the centre
def padded(image, size):
    return ImageProcessor(size)(ImageOps.fit(image, (size, size)))[0]


# %% 2 · bars are black
def padded(image, size):
    return ImageProcessor(size)(ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC))[0]


# %% 2 · picture in the corner
def padded(image, size):
    factor = size / max(image.size)
    small = image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)
    pixels = (torch.tensor(np.array(small, np.float32)).permute(2, 0, 1) / 255 - 0.5) / 0.5
    out = torch.zeros(3, size, size)
    out[:, : small.height, : small.width] = pixels
    return out


# %% 2 · bars are 0 before normalising
def padded(image, size):
    factor = size / max(image.size)
    small = image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (size - small.width) // 2, (size - small.height) // 2
    out = np.zeros((size, size, 3), np.float32)
    out[top : top + small.height, left : left + small.width] = np.asarray(small) / 255
    return torch.tensor((out - 0.5) / 0.5).permute(2, 0, 1)


# %% 2 · channels last
def padded(image, size):
    square = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color="#808080")
    return (torch.tensor(np.array(square, np.float32)) / 255 - 0.5) / 0.5


# %% 2 · not normalised
def padded(image, size):
    factor = size / max(image.size)
    small = image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (size - small.width) // 2, (size - small.height) // 2
    out = torch.zeros(3, size, size)
    pixels = torch.tensor(np.array(small, np.float32)).permute(2, 0, 1) / 255
    out[:, top : top + small.height, left : left + small.width] = pixels
    return out


# %% 2 · resizes without antialiasing
def padded(image, size):
    factor = size / max(image.size)
    width, height = (round(side * factor) for side in image.size)
    x = torch.tensor(np.array(image, np.float32)).permute(2, 0, 1)[None]
    small = F.interpolate(x, (height, width), mode="bicubic").clamp(0, 255)[0]
    left, top = (size - width) // 2, (size - height) // 2
    out = torch.zeros(3, size, size)
    out[:, top : top + height, left : left + width] = (small / 255 - 0.5) / 0.5
    return out


# %% 2 · scales by the width, whichever side is longer
def padded(image, size):
    small = image.resize((size, round(image.height * size / image.width)))
    pixels = (torch.tensor(np.array(small, np.float32)).permute(2, 0, 1) / 255 - 0.5) / 0.5
    out = torch.zeros(3, size, size)
    top = max(0, (size - small.height) // 2)
    out[:, top : top + small.height] = pixels[:, :size]
    return out


# %% 2 · returns an array
def padded(image, size):
    return np.zeros((3, size, size), np.float32)


# %% 3 · all white
def two_faced():
    return np.full((448, 448, 3), 255, np.uint8)


# %% 3 · all black
def two_faced():
    return np.zeros((448, 448, 3), np.uint8)


# %% 3 · the other pixels of four
def two_faced():
    picture = np.zeros((448, 448, 3), np.uint8)
    picture[1::2, 1::2] = 255
    return picture


# %% 3 · whole rows are white: half of the light stays
def two_faced():
    picture = np.zeros((448, 448, 3), np.uint8)
    picture[::2] = 255
    return picture


# %% 3 · the rest is mid-grey
def two_faced():
    picture = np.full((448, 448, 3), 128, np.uint8)
    picture[::2, ::2] = 255
    return picture


# %% 3 · floats in 0…1
def two_faced():
    picture = np.zeros((448, 448, 3))
    picture[::2, ::2] = 1
    return picture


# %% 3 · the small picture that the loader returns
def two_faced():
    return np.full((224, 224, 3), 255, np.uint8)
