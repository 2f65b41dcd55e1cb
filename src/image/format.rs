// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Recognising image formats that are not raw (R20): served raw, they would be destroyed.

use std::fmt;

/// How much of the file's start [`Format::detect`] wants to see.
pub(super) const HEAD: usize = 512;

/// A format with a header of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// QEMU's, version 1, 2 or 3.
    Qcow2,
    /// VMware's, sparse or a descriptor.
    Vmdk,
    /// Hyper-V's newer one.
    Vhdx,
    /// VirtualBox's.
    Vdi,
    /// Hyper-V's older one; fixed images have only a footer.
    Vhd,
    /// QEMU's abandoned one.
    Qed,
}

impl Format {
    /// What the first [`HEAD`] bytes of a file (fewer, if it is shorter) and its last 512 say.
    pub(super) fn detect(head: &[u8], tail: &[u8]) -> Option<Self> {
        const MAGIC: [(usize, &[u8], Format); 9] = [
            (0, b"QFI\xfb", Format::Qcow2),
            (0, b"KDMV", Format::Vmdk),
            (0, b"COWD", Format::Vmdk),
            (0, b"# Disk DescriptorFile", Format::Vmdk),
            (0, b"vhdxfile", Format::Vhdx),
            (0x40, b"\x7f\x10\xda\xbe", Format::Vdi),
            (0, b"conectix", Format::Vhd),
            (0, b"cxsparse", Format::Vhd),
            (0, b"QED\0", Format::Qed),
        ];
        MAGIC
            .iter()
            .find(|(at, magic, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)))
            .map(|(_, _, format)| *format)
            .or_else(|| tail.starts_with(b"conectix").then_some(Self::Vhd))
    }

    /// What `qemu-img convert -f` calls it.
    pub(super) const fn qemu_name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
            Self::Vhd => "vpc",
            Self::Qed => "qed",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "VMDK",
            Self::Vhdx => "VHDX",
            Self::Vdi => "VDI",
            Self::Vhd => "VHD",
            Self::Qed => "QED",
        })
    }
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
