# %% 1 · calculates as if there were room
answer = (300, 150, -100)
# %% 1 · stops at the ends
answer = (255, 127, 0)
# %% 1 · the mean of the two numbers
answer = (44, 150, 156)
# %% 1 · takes the sign away
answer = (44, 22, 100)
# %% 1 · the circle has 255 places
answer = (45, 22, 155)
# %% 1 · the difference the other way round
answer = (44, 22, -100)
# %% 1 · one number
answer = 44


# %% 2 · reshapes
def to_picture(signed):
    channels, height, width = signed.shape
    return (
        ((signed + 1) / 2 * 255)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        .reshape(height, width, channels)
    )


# %% 2 · swaps height and width
def to_picture(signed):
    return ((signed + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8).permute(2, 1, 0)


# %% 2 · leaves the channel first
def to_picture(signed):
    return ((signed + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8)


# %% 2 · does not round
def to_picture(signed):
    return ((signed + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


# %% 2 · does not clamp
def to_picture(signed):
    return ((signed + 1) / 2 * 255).round().to(torch.uint8).permute(1, 2, 0)


# %% 2 · forgets that 0 is grey
def to_picture(signed):
    return (signed * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


# %% 2 · 256 instead of 255
def to_picture(signed):
    return ((signed + 1) / 2 * 256).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


# %% 2 · stays float
def to_picture(signed):
    return ((signed + 1) / 2).clamp(0, 1).permute(1, 2, 0)


# %% 2 · turns blue and red round as well
def to_picture(signed):
    return ((signed + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).flip(2)


# %% 2 · a NumPy array
def to_picture(signed):
    return ((signed + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


# %% 3 · one grey
def blind_picture():
    return torch.full((4, 4, 3), 128, dtype=torch.uint8)


# %% 3 · any colours
def blind_picture():
    return torch.arange(48, dtype=torch.uint8).view(4, 4, 3)


# %% 3 · red equals green
def blind_picture():
    picture = torch.arange(48, dtype=torch.uint8).view(4, 4, 3)
    picture[:, :, 1] = picture[:, :, 0]
    return picture


# %% 3 · floats
def blind_picture():
    return torch.rand(4, 4, 1).expand(4, 4, 3)


# %% 3 · channels first
def blind_picture():
    return torch.arange(16, dtype=torch.uint8).view(1, 4, 4).expand(3, 4, 4).contiguous()


# %% 3 · a picture of Pillow
def blind_picture():
    return Image.new("RGB", (4, 4), "purple")


# %% 3 · too few colours
def blind_picture():
    picture = torch.zeros(2, 4, 3, dtype=torch.uint8)
    picture[:, ::2, 1] = 255
    return picture


# %% 3 · symmetric from left to right
def blind_picture():
    picture = torch.arange(48, dtype=torch.uint8).view(4, 4, 3)
    return torch.cat([picture, picture.flip(1)], dim=1)
