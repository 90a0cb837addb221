//! The cluster's certificates and the kubeconfig files that use them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose, SanType,
};

/// The cluster's own authority, in a directory that it fills.
pub struct Pki {
    dir: PathBuf,
    ca: CertifiedIssuer<'static, KeyPair>,
}

impl std::fmt::Debug for Pki {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pki({})", self.dir.display())
    }
}

impl Pki {
    /// Makes the authority, and the key that signs service accounts' tokens.
    pub fn create(dir: PathBuf) -> Result<Pki> {
        let mut params = CertificateParams::default();
        params.distinguished_name = name(None, "test-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let pki = Pki { dir, ca };
        pki.write("ca.crt", &pki.ca.pem())?;
        pki.write("ca.key", &pki.ca.key().serialize_pem())?;
        let accounts = KeyPair::generate()?;
        pki.write("sa.key", &accounts.serialize_pem())?;
        pki.write("sa.pub", &accounts.public_key_pem())?;
        Ok(pki)
    }

    /// Makes NAME.crt and NAME.key, good for both ends of a connection.
    pub fn issue(
        &self,
        file: &str,
        group: Option<&str>,
        user: &str,
        dns: &[&str],
        ips: &[IpAddr],
    ) -> Result<()> {
        let mut params = CertificateParams::default();
        params.distinguished_name = name(group, user);
        for dns in dns {
            params.subject_alt_names.push(SanType::DnsName((*dns).try_into()?));
        }
        params.subject_alt_names.extend(ips.iter().map(|ip| SanType::IpAddress(*ip)));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.ca)?;
        self.write(&format!("{file}.crt"), &certificate.pem())?;
        self.write(&format!("{file}.key"), &key.serialize_pem())
    }

    /// Path of one of its files.
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        std::fs::write(self.path(file), text).with_context(|| file.to_owned())
    }
}

fn name(group: Option<&str>, user: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    if let Some(group) = group {
        name.push(DnType::OrganizationName, group);
    }
    name.push(DnType::CommonName, user);
    name
}

/// Writes a kubeconfig whose files are named as they will be found under `dir`.
pub fn kubeconfig(to: &Path, server: &str, dir: &Path, file: &str) -> Result<()> {
    let user = dir.join(file).display().to_string();
    write_kubeconfig(
        to,
        server,
        &dir.join("ca.crt"),
        &format!("client-certificate: {user}.crt, client-key: {user}.key"),
    )
}

/// Writes a kubeconfig for who holds the token in a file.
pub fn token_kubeconfig(to: &Path, server: &str, ca: &Path, token: &Path) -> Result<()> {
    write_kubeconfig(to, server, ca, &format!("tokenFile: {}", token.display()))
}

fn write_kubeconfig(to: &Path, server: &str, ca: &Path, user: &str) -> Result<()> {
    let ca = ca.display();
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
         clusters: [{{name: test, cluster: {{server: \"{server}\", certificate-authority: {ca}}}}}]\n\
         users: [{{name: test, user: {{{user}}}}}]\n\
         contexts: [{{name: test, context: {{cluster: test, user: test}}}}]\n"
    );
    std::fs::write(to, text).with_context(|| to.display().to_string())
}
