//! What an image's first sector says about its format. Pure.
//!
//! Only the signature at a fixed place is looked at, as QEMU's probe functions do for these formats. A *probed* raw
//! image also refuses writes that would make this function answer something else: otherwise a guest could write the
//! header of a format with a backing file into its own disk, and the next open without a format would follow it to
//! any file of the host (CVE-2008-2004).

/// Bytes that [`probe`] looks at (QEMU: BLOCK_PROBE_BUF_SIZE).
pub const PROBE_LEN: usize = 512;

/// A format that is not raw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForeignFormat {
    /// QEMU copy-on-write, version 2 or 3 ("QFI\xfb").
    Qcow2,
    /// QEMU copy-on-write, version 1.
    Qcow,
    /// QEMU enhanced disk.
    Qed,
    /// VMware, sparse extent or descriptor file.
    Vmdk,
    /// Hyper-V, version 2.
    Vhdx,
    /// Virtual PC, dynamic or differencing disk.
    Vpc,
    /// VirtualBox.
    Vdi,
    /// LUKS, version 1 or 2.
    Luks,
    /// Bochs growing disk.
    Bochs,
    /// Parallels.
    Parallels,
    /// Compressed loop image.
    Cloop,
}

impl std::fmt::Display for ForeignFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ForeignFormat::Qcow2 => "qcow2",
            ForeignFormat::Qcow => "qcow",
            ForeignFormat::Qed => "qed",
            ForeignFormat::Vmdk => "vmdk",
            ForeignFormat::Vhdx => "vhdx",
            ForeignFormat::Vpc => "vpc",
            ForeignFormat::Vdi => "vdi",
            ForeignFormat::Luks => "luks",
            ForeignFormat::Bochs => "bochs",
            ForeignFormat::Parallels => "parallels",
            ForeignFormat::Cloop => "cloop",
        })
    }
}

/// Signatures: offset, bytes, format. Each from the format's own document or QEMU's driver of that name.
const SIGNATURES: &[(usize, &[u8], ForeignFormat)] = &[
    // qcow2.txt, Header, bytes 0-3; the version behind it tells qcow from qcow2 (see `probe`).
    (0, b"QFI\xfb", ForeignFormat::Qcow2),
    // qed_spec.txt, Header, magic.
    (0, b"QED\0", ForeignFormat::Qed),
    // Virtual Disk Format 5.0, SparseExtentHeader.magicNumber, and the older COWD.
    (0, b"KDMV", ForeignFormat::Vmdk),
    (0, b"COWD", ForeignFormat::Vmdk),
    // [MS-VHDX] 2.2.1, File Type Identifier.
    (0, b"vhdxfile", ForeignFormat::Vhdx),
    // Virtual Hard Disk Image Format, footer copy at offset 0 of dynamic disks.
    (0, b"conectix", ForeignFormat::Vpc),
    // QEMU block/vdi.c: signature 0xbeda107f, little-endian, at 0x40.
    (0x40, b"\x7f\x10\xda\xbe", ForeignFormat::Vdi),
    // LUKS on-disk format, magic.
    (0, b"LUKS\xba\xbe", ForeignFormat::Luks),
    // QEMU block/bochs.c: header magic.
    (0, b"Bochs Virtual HD Image", ForeignFormat::Bochs),
    // parallels.txt, magic, both versions.
    (0, b"WithoutFreeSpace", ForeignFormat::Parallels),
    (0, b"WithouFreSpacExt", ForeignFormat::Parallels),
    // QEMU block/cloop.c.
    (
        0,
        b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n",
        ForeignFormat::Cloop,
    ),
];

/// Names the format that the first bytes of an image claim; `None` is raw. `head` may be shorter than [`PROBE_LEN`].
#[must_use]
pub fn probe(head: &[u8]) -> Option<ForeignFormat> {
    for &(at, magic, format) in SIGNATURES {
        if head.get(at..at + magic.len()) == Some(magic) {
            if format == ForeignFormat::Qcow2 && head.get(4..8) == Some(&[0, 0, 0, 1]) {
                return Some(ForeignFormat::Qcow);
            }
            return Some(format);
        }
    }
    // Virtual Disk Format 5.0: a text descriptor may begin with comments and blank lines.
    let text = &head[..head.len().min(PROBE_LEN)];
    for line in text.split_inclusive(|&b| b == b'\n') {
        let line = line.trim_ascii();
        if line.starts_with(b"# Disk DescriptorFile") || line.starts_with(b"version=1") && text[0] == b'#' {
            return Some(ForeignFormat::Vmdk);
        }
        if !(line.is_empty() || line.starts_with(b"#")) {
            break;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_by_their_signatures() {
        fn check(at: usize, bytes: &[u8], want: Option<ForeignFormat>) {
            let mut head = [0u8; PROBE_LEN];
            head[at..at + bytes.len()].copy_from_slice(bytes);
            assert_eq!(probe(&head), want, "{bytes:?} at {at}");
        }
        check(0, b"", None);
        check(0, b"QFI\xfb\0\0\0\x03", Some(ForeignFormat::Qcow2));
        check(0, b"QFI\xfb\0\0\0\x01", Some(ForeignFormat::Qcow));
        check(0, b"QED\0", Some(ForeignFormat::Qed));
        check(0, b"QEDx", None);
        check(0, b"KDMV", Some(ForeignFormat::Vmdk));
        check(0, b"# Disk DescriptorFile\nversion=1\n", Some(ForeignFormat::Vmdk));
        check(0, b"#!/bin/sh\nexit 0\n", None);
        check(0, b"vhdxfile", Some(ForeignFormat::Vhdx));
        check(0, b"conectix", Some(ForeignFormat::Vpc));
        check(0x40, b"\x7f\x10\xda\xbe", Some(ForeignFormat::Vdi));
        check(0, b"LUKS\xba\xbe\0\x02", Some(ForeignFormat::Luks));
        check(0, b"WithoutFreeSpace", Some(ForeignFormat::Parallels));
        check(510, b"\x55\xaa", None);
    }

    #[test]
    fn short_heads_are_raw() {
        for n in 0..4 {
            assert_eq!(probe(&b"QFI\xfb"[..n]), None);
        }
        assert_eq!(probe(b"QFI\xfb"), Some(ForeignFormat::Qcow2));
    }
}
