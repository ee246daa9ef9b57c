"""Rotations as a robot's numbers: 6D, matrix, quaternion, axis-angle.

6D is the first two columns of the matrix, one after the other (Zhou et al. 2019, arXiv
1812.07035); quaternions are (w, x, y, z), as MuJoCo's; axis-angle is the axis times the angle in
radians.
Axes: `...` is any shape, the last axis (or the last two, of a matrix) is the rotation.
"""
import torch
from torch import nn


def rotation_6d_to_matrix(x):
    """(..., 6) -> (..., 3, 3); any six numbers whose halves are not parallel will do."""
    # Gram-Schmidt: of the second half only what stands upright on the first counts.
    a, b = x[..., :3], x[..., 3:]
    first = nn.functional.normalize(a, dim=-1)
    second = nn.functional.normalize(b - (first * b).sum(-1, keepdim=True) * first, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


def matrix_to_rotation_6d(matrix):
    """(..., 3, 3) -> (..., 6)."""
    return torch.cat([matrix[..., 0], matrix[..., 1]], -1)


def quaternion_to_matrix(q):
    """(..., 4) of any length but zero -> (..., 3, 3)."""
    w, x, y, z = nn.functional.normalize(q, dim=-1).unbind(-1)
    entries = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y))
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def matrix_to_quaternion(m):
    """(..., 3, 3) -> (..., 4) of length 1 with w >= 0."""
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]

    # The matrix gives each product of two of the quaternion's numbers q_i: 4 q_i^2,
    w2 = 1 + xx + yy + zz
    x2 = 1 + xx - yy - zz
    y2 = 1 - xx + yy - zz
    z2 = 1 - xx - yy + zz

    # 4 w q_i,
    wx = m[..., 2, 1] - m[..., 1, 2]
    wy = m[..., 0, 2] - m[..., 2, 0]
    wz = m[..., 1, 0] - m[..., 0, 1]

    # and the others.
    xy = m[..., 0, 1] + m[..., 1, 0]
    xz = m[..., 0, 2] + m[..., 2, 0]
    yz = m[..., 1, 2] + m[..., 2, 1]
    products = torch.stack([
        torch.stack((w2, wx, wy, wz), -1),
        torch.stack((wx, x2, xy, xz), -1),
        torch.stack((wy, xy, y2, yz), -1),
        torch.stack((wz, xz, yz, z2), -1)], -2)         # (..., 4, 4)

    # Each row is the quaternion times one of its numbers. The row of the largest number is the
    # one that loses nothing to rounding (Shepperd 1978).
    squares = torch.stack([w2, x2, y2, z2], -1)
    largest = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    q = nn.functional.normalize(products.gather(-2, largest)[..., 0, :], dim=-1)

    # q and -q are the same rotation.
    return torch.where(q[..., :1] < 0, -q, q)


def axis_angle_to_matrix(v):
    """(..., 3) -> (..., 3, 3)."""
    half = v.norm(dim=-1, keepdim=True) / 2

    # sin(half) v / angle by sinc, which is smooth where the angle is 0.
    imaginary = v / 2 * torch.sinc(half / torch.pi)
    return quaternion_to_matrix(torch.cat([half.cos(), imaginary], -1))


def matrix_to_axis_angle(m):
    """(..., 3, 3) -> (..., 3), angles from 0 to pi."""
    q = matrix_to_quaternion(m)
    sine = q[..., 1:].norm(dim=-1, keepdim=True)
    half = torch.atan2(sine, q[..., :1])
    return q[..., 1:] * 2 / torch.sinc(half / torch.pi).clamp_min(1e-12)


# What prepare/lerobot.py --rotations turns columns of a data set by, there and back.


def quaternion_to_rotation_6d(q):
    """(..., 4) -> (..., 6)."""
    return matrix_to_rotation_6d(quaternion_to_matrix(q))


def rotation_6d_to_quaternion(x):
    """(..., 6) -> (..., 4)."""
    return matrix_to_quaternion(rotation_6d_to_matrix(x))


def axis_angle_to_rotation_6d(v):
    """(..., 3) -> (..., 6)."""
    return matrix_to_rotation_6d(axis_angle_to_matrix(v))


def rotation_6d_to_axis_angle(x):
    """(..., 6) -> (..., 3)."""
    return matrix_to_axis_angle(rotation_6d_to_matrix(x))
