declare module "*.wat" {
  const base64: string
  export default base64
}
declare module "*.css"
